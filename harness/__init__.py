"""What surrounds the stages: flags, checks, plan, record, checkpoint, export, exit codes."""
