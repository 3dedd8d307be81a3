"""The form `half`: weights and activations in float16, with what must not be left in float32."""
