"""What was measured of kernels: tables of tactics and crossovers, and the cards they are for."""
