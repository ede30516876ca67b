"""Everything that touches a language model: layouts, text, scores, measuring, surgery, export."""
