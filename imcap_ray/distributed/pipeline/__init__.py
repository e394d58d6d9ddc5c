"""Ray Data over images: reading, decoding, actors, isolation of crashes, progress, Parquet output."""
