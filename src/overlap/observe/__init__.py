"""What people see of a running engine."""
