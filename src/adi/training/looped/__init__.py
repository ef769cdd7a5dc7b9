"""Parts of the training of looped models: rules of sparse layers, items that grow harder."""
