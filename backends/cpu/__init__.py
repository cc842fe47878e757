"""Everything that only a machine without a GPU needs. On a cluster the folder can be deleted."""
