"""What commands share: options, tables, colours."""
