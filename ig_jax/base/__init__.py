"""What every room uses: errors, files, progress, the binding of settings."""
