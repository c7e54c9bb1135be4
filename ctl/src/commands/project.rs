//! `project …`.

use fermata_protocol::Target;
use fermata_protocol::project::{ProjectConfig, ProjectCreate, ProjectList, ProjectSet, ProjectShow, WorkspaceSource};

use super::run::{canonical, text};
use super::{Ended, agents, status};
use crate::cli::groups::{ConfigArgs, ProjectCommand};
use crate::errors::Failure;
use crate::session::Session;

/// Runs a `project` command.
pub fn run(session: &mut Session, command: ProjectCommand) -> Ended {
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
                workspace: text(&canonical(&directory)?)?,
                description,
                source,
                config: changed(ProjectConfig::default(), config),
            })?;
            let id = project.name.to_string();
            session.out.one(&project, Some(id), |out, project| {
                out.line(format_args!("{} created for {}", project.name, project.workspace))
            })?;
            Ok(0)
        }
        ProjectCommand::Set { project, description, phase, config } => {
            let config = if config.is_empty() {
                None
            } else {
                // Settings are replaced whole, so those that were not given are read first.
                let show = ProjectShow { project: project.clone() };
                changed(session.call(&show)?.config, config)
            };
            if description.is_none() && phase.is_none() && config.is_none() {
                return Err(
                    Failure::usage("nothing to change").hint("fermatactl project set --help lists what can be changed")
                );
            }
            let project = session.call(&ProjectSet { project, description, phase, config })?;
            let id = project.name.to_string();
            session.out.one(&project, Some(id), |out, project| out.line(format_args!("{} changed", project.name)))?;
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

impl ConfigArgs {
    fn is_empty(&self) -> bool {
        self.include.is_empty()
            && self.exclude.is_empty()
            && self.use_gitignore.is_none()
            && self.max_file_size.is_none()
            && self.token_limit.is_none()
            && self.flash_save_at.is_none()
            && self.budget.is_empty()
            && self.retention.is_empty()
            && self.automatic.is_empty()
    }
}

/// Lays what was given over settings; `None` when nothing was given.
fn changed(mut config: ProjectConfig, args: ConfigArgs) -> Option<ProjectConfig> {
    if args.is_empty() {
        return None;
    }
    // An empty pattern is how a list is emptied again.
    let list = |given: Vec<String>| given.into_iter().filter(|p| !p.is_empty()).collect();
    if !args.include.is_empty() {
        config.include = list(args.include);
    }
    if !args.exclude.is_empty() {
        config.exclude = list(args.exclude);
    }
    if let Some(use_gitignore) = args.use_gitignore {
        config.use_gitignore = use_gitignore;
    }
    if let Some(bytes) = args.max_file_size {
        config.max_file_bytes = bytes;
    }
    if let Some(tokens) = args.token_limit {
        config.token_limit = tokens;
    }
    if let Some(percent) = args.flash_save_at {
        config.flash_save_at_percent = percent;
    }
    config.budget = args.budget.over(config.budget);
    config.retention = args.retention.over(config.retention);
    config.automatic = args.automatic.over(config.automatic);
    Some(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_are_not_given_stay() {
        let before = ProjectConfig { exclude: vec!["target/".into()], token_limit: 7, ..ProjectConfig::default() };
        let args = ConfigArgs { max_file_size: Some(9), ..ConfigArgs::default() };
        let after = changed(before.clone(), args).expect("something was given");
        assert_eq!((after.exclude, after.token_limit, after.max_file_bytes), (before.exclude.clone(), 7, 9));
        assert_eq!(changed(before, ConfigArgs::default()), None);
    }
}
