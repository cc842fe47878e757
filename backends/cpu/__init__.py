"""Everything that only a machine without a GPU needs; on a cluster the folder can be deleted."""
