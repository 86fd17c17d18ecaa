"""The ground floor: from a quantized node to a device's kernel."""
