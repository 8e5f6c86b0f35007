"""What makes other forms of this package from it."""
