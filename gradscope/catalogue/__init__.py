"""The rule pages: one Markdown file per code; the exception texts quoted there are those of torch 2.15."""
