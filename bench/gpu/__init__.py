"""Measurements on a card, part by part, with torch, numpy and faiss alone"""
