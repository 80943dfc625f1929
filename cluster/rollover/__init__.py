"""From one generation to the next while the cluster serves: its writes brought over, its gate"""
