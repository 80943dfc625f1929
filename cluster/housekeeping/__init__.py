"""What a store no longer needs: found, removed, and erased where items have been deleted"""
