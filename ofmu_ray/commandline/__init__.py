"""What commands share: reading options and configuration files, help, and what the terminal shows."""
