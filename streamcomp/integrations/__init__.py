"""Where the result meets other libraries."""
