"""What the data types of images share: files, sources, transforms."""
