//! `project …`.

use fermata_protocol::Target;
use fermata_protocol::project::{ProjectConfig, ProjectCreate, ProjectList, ProjectSet, ProjectShow, WorkspaceSource};

use super::{agents, status};
use crate::cli::groups::ProjectCommand;
use crate::errors::{CommandError, CommandResult};
use crate::paths::{canonical, to_utf8};
use crate::session::DaemonSession;

pub fn run(session: &mut DaemonSession, command: ProjectCommand) -> CommandResult {
    match command {
        ProjectCommand::Create {
            name,
            workspace,
            description,
            source_type,
            source_location,
            source_branch,
            config,
        } => {
            let directory = workspace.unwrap_or_else(|| ".".into());
            let source = source_type.zip(source_location).map(|(kind, location)| WorkspaceSource {
                kind,
                location,
                branch: source_branch,
            });
            let project = session.call(&ProjectCreate {
                name,
                workspace: to_utf8(&canonical(&directory)?)?,
                description,
                source,
                config: config.apply(ProjectConfig::default()),
            })?;
            let id = project.name.to_string();
            session.out.object(&project, Some(id), |out, project| {
                out.line(format_args!("{} created for {}", project.name, project.workspace))
            })?;
            Ok(0)
        }
        ProjectCommand::Set { project, description, phase, config } => {
            let config = if config.is_empty() {
                None
            } else {
                // The daemon replaces the whole configuration, so the settings that were not given are read first.
                let show = ProjectShow { project: project.clone() };
                config.apply(session.call(&show)?.config)
            };
            if description.is_none() && phase.is_none() && config.is_none() {
                return Err(CommandError::usage("nothing to change")
                    .hint("fermatactl project set --help lists what can be changed"));
            }
            let project = session.call(&ProjectSet { project, description, phase, config })?;
            let id = project.name.to_string();
            session
                .out
                .object(&project, Some(id), |out, project| out.line(format_args!("{} updated", project.name)))?;
            Ok(0)
        }
        ProjectCommand::Ls => {
            let projects = session.call(&ProjectList {})?.projects;
            let name = |project: &fermata_protocol::project::ProjectView| project.name.clone();
            session.out.rows(&projects, "no projects", name, status::project_table)?;
            Ok(0)
        }
        ProjectCommand::Show { project } => status::show(session, project),
        ProjectCommand::Rm { project, with_checkpoints } => {
            agents::remove(session, Target::project(project), with_checkpoints)
        }
    }
}
