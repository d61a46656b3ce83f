"""Reading: inputs of a scan, training sources, label maps, the contrast set, OCR."""
