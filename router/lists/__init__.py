"""Named lists of item ids, held by the store: files, cache, and what a search leaves out"""
