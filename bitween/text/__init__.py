"""Text of calibration, selection and certification: documents, windows, splits, and the text that is shipped."""
