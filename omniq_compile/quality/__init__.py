"""What quantizing costs in quality: pictures compared with BF16, and traded for bytes."""
