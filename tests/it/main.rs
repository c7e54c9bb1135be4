//! The daemon's integration tests: one module per command.

mod adoption;
mod agent_side;
mod autostart;
mod bed;
mod chaos;
mod checkpoint;
mod kill;
mod lifecycle;
mod logs;
mod pause;
mod pause_crash;
mod plugins;
mod protocol;
mod ps;
mod restart;
mod restore;
mod rm;
mod roles;
mod run;
mod scene;
mod signals;
mod stop;
mod wait;
