# For login shells on the hosts: where the commands are, and that this Ray asks for its token.
export PATH="$HOME/shardline/.venv/bin:$PATH"
export RAY_AUTH_MODE=token
