"""How wrong a reflex may be: bounds, certificates, drift; and what surprise and depth cost together: free energy."""
