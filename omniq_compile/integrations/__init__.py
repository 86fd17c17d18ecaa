"""What diffusers and transformers ask of a quantizer."""
