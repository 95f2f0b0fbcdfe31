"""Ways of taking gradients through an integration that keep less than backpropagation does."""
