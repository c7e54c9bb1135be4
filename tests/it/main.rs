//! The daemon's integration tests: one module per command.

mod adoption;
mod agent_side;
mod autostart;
mod bed;
mod kill;
mod logs;
mod plugins;
mod protocol;
mod ps;
mod restart;
mod rm;
mod run;
mod signals;
mod stop;
mod wait;
