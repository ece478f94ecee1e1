"""What must outlive its process: files replaced whole, rows appended, evidence chained, values as JSON, and hashes."""
