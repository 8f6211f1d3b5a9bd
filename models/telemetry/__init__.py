"""What steps ran: counts, one request's sums and record, the report made of it, and their way."""
