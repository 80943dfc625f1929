"""From one generation to the next while the cluster serves: mirrored writes, and the gate."""
