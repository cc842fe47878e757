"""All that only a machine without a GPU needs; delete the folder on a cluster."""
