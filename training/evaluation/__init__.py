"""Recall, MRR, NDCG and HitRate beside baselines, exact and through a cluster."""
