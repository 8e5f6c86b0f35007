"""What is said about it: tables, pictures, the documents' figures, and the promises beside them."""
