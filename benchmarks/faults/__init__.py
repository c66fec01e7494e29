"""What goes wrong on machines, provoked: each fault with what it costs."""
