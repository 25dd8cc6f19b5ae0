"""Who holds which part of every matrix, who computes, what travels."""
