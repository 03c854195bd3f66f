"""The cluster's own certificate authority: for clusters that get no certificates from elsewhere."""
