# What Ray's processes on the head need besides environment.sh: the table HEAD in router/serve/environment.py.
export RAY_gcs_storage=rocksdb
export RAY_gcs_storage_path="$HOME/shardline-gcs"
export RAY_enable_autoscaler_v2=0
