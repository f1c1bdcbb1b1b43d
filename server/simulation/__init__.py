"""The simulation: five hospitals on one machine. `hospitals` makes their images and holds the example study."""
