"""Image classification: the task, its sets, folders and archives, batches with augmentation."""
