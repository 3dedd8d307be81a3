"""The form `static` of int8: weights and activations in 8 bits, with ranges measured on calibration data."""
