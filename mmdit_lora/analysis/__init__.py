"""What the papers of low-rank adaptation measured, on one's own adapter: spectra, amplification, smaller ranks."""
