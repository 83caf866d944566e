"""Parts that mixers and the decoder are made of."""
