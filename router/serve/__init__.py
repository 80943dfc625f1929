"""Every patch of Ray Serve and HAProxy."""
