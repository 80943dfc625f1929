"""The contrastive loss: columns, corrections, masks, tiles."""
