"""Files: planned down to every offset, written tensor by tensor, durable and in place when they are whole."""
