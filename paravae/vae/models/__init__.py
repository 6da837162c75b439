"""The networks: plain, for one device, with their state passed explicitly."""
