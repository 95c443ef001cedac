"""resconv"""
