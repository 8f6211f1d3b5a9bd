"""Reports as HTML pages that need nothing else: no scripts, no files beside them."""
