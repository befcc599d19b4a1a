"""The SGLang adapter. This release registers nothing with SGLang: the package only holds its place."""
