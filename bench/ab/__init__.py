"""Arms side by side: replays of one query set, and reports of events"""
